"""An HTTP server that clients of OpenAI's API talk to (docs/how-to/server.md)."""
