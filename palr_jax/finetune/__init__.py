"""Fine-tuning: LoRA adapters on the instruction tasks, loss on the answer alone.

`optimizer.py` freezes the base, `input.py` packs examples into rows, `train.py` is the loop.
"""
