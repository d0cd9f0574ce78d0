"""Programs for 64-bit Arm on this machine: a Debian root, without installing anything into the
system, and processors as qemu emulates them (docs/how-to/arm64.md)."""
