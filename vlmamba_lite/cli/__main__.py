"""`python -m vlmamba_lite.cli`, as launchers of several processes start it: the command vlmamba."""
from vlmamba_lite.cli.commands import app

if __name__ == "__main__":
    app(prog_name="vlmamba")
