"""Forward pass, gradients and update as one compiled graph."""
