"""The former name of refresh.py."""
from refresh import main

if __name__ == "__main__":
    main()
