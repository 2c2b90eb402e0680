"""LLaMA in Flax: the model, its weights from Hugging Face and GGUF, and LoRA adapters.

`model.py` is the architecture, `attention.py` who attends to whom, `load.py` reads weights.
"""
