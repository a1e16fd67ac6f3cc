"""What training did, and how the result works: emergence, alignment, and a page that shows both."""
