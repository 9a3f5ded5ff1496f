"""What people meet: the server, the chat in a terminal, the page."""
