import torch.nn.functional as F
from torch import nn

from vlmamba_lite.vss import VSS

__all__ = ["MLPConnector", "VSSMLPConnector", "VSSL2Connector"]


def _mlp(vision_dim, language_dim):
    return nn.Sequential(nn.Linear(vision_dim, language_dim), nn.GELU(), nn.Linear(language_dim, language_dim))


class MLPConnector(nn.Module):
    "V_out = MLP(V_img): two layers, every token alone (VL-Mamba, Figure 2 a)."

    def __init__(self, vision_dim, language_dim):
        super().__init__()
        self.mlp = _mlp(vision_dim, language_dim)

    def forward(self, tokens, size): return self.mlp(tokens)


class VSSMLPConnector(nn.Module):
    "V_scan = VSS(V_img); V_out = MLP(Norm(V_scan + V_img)) (VL-Mamba, equation 5)."

    def __init__(self, vision_dim, language_dim, scan="bsm", **vss_args):
        super().__init__()
        self.vss = VSS(vision_dim, scan, **vss_args)
        self.norm = nn.RMSNorm(vision_dim, eps=1e-5)
        self.mlp = _mlp(vision_dim, language_dim)

    def forward(self, tokens, size): return self.mlp(self.norm(self.vss(tokens, size) + tokens))


class VSSL2Connector(nn.Module):
    "V' = Linear(V_img); V_scan = VSS(GELU(V')); V_out = Linear(Norm(V_scan + V')) (VL-Mamba, equation 6)."

    def __init__(self, vision_dim, language_dim, scan="bsm", **vss_args):
        super().__init__()
        self.linear1 = nn.Linear(vision_dim, language_dim)
        self.vss = VSS(language_dim, scan, **vss_args)
        self.norm = nn.RMSNorm(language_dim, eps=1e-5)
        self.linear2 = nn.Linear(language_dim, language_dim)

    def forward(self, tokens, size):
        v = self.linear1(tokens)
        return self.linear2(self.norm(self.vss(F.gelu(v), size) + v))
