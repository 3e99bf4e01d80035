"""The masked autoencoder (He et al. 2022)."""
