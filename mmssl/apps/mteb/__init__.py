"""Our models in mteb, whose image part is MIEB (Xiao et al. 2025)."""

from mmssl.apps.mteb.encoder import MtebEncoder

__all__ = ["MtebEncoder"]
