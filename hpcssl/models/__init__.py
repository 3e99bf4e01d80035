"""Encoders, projection heads, the MAE decoder, gated attention."""
