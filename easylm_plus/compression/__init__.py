"""Making a trained model smaller: what a matrix is rounded to, which weights it loses, and the walk over the layers."""
