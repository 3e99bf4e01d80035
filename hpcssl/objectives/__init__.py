"""The DINO and MAE losses."""
