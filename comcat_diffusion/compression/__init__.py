"""Compression of attention-based vision models: head-level low rank with automatic rank selection."""

from comcat_diffusion.compression.compress import compress
from comcat_diffusion.compression.plan import Plan, Settings
from comcat_diffusion.compression.rank_search import SearchSettings, search_ranks
from comcat_diffusion.compression.store import load_compressed, save_compressed

__all__ = ["Plan", "SearchSettings", "Settings", "compress", "load_compressed", "save_compressed", "search_ranks"]
