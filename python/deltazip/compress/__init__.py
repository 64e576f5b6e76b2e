"""Delta-Compress: from a full fine-tune to a small delta file.

Needs torch and transformers: `pip install deltazip[compress]`.
"""
