"""Records, chat templates, images and batches."""
