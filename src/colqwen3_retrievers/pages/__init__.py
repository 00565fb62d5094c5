"""What is read: pages, files, images, PDFs, videos and remote images."""
