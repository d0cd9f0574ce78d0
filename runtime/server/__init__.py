"""An HTTP server that clients of OpenAI's API talk to (docs/server.md)."""
