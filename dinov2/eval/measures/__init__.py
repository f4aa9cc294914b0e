"""What frozen features know, without training a head of use."""
