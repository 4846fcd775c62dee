"""What a network is made of: structure, table, drawing and feature maps."""
