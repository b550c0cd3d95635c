"""Post-training: supervised fine-tuning, reinforcement learning and distillation of a model that was pre-trained.

Each algorithm is one short file over the same four: `config.py` (settings), `examples.py` (ids and what is learned of
them), `scoring.py` (log-probabilities) and `trainer.py` (updates, figures, exact resume).
"""
