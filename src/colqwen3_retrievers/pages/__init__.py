"""Pages and their sources: files, images, PDFs, videos and remote images."""
