"""PALR in JAX: user history guides retrieval, an LLM ranks what was retrieved."""

__version__ = '0.1.0'
