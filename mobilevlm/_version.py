"""The version of this distribution; setup.cfg and manifests read it here."""

__version__ = "0.1.0"
