"""What an image can be conditioned on: reading it from files, or computing it from the image."""
