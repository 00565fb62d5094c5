"""Training of the tiny ColQwen3 checkpoint that the package ships."""
