"""Operations with a PyTorch reference each; imports torch only."""
