"""What has to hold on an NVIDIA GPU, in one command and one table; see __main__.py."""
