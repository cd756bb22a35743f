"""TensorBoard: event files from records, and the server that shows them. Imports run and below."""
