"""The process hybrid: noise that masks a token or replaces it by any other."""
