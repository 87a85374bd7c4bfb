"""Configuration: one schema behind the library, the daemon, the command line and the engines."""

from droidspeak.config.serving import Address, ServerSettings, TenantSettings, TlsSettings, TokenSettings
from droidspeak.config.settings import Settings, load_settings, open_policies, open_store, open_tiers

__all__ = [
    "Address",
    "ServerSettings",
    "Settings",
    "TenantSettings",
    "TlsSettings",
    "TokenSettings",
    "load_settings",
    "open_policies",
    "open_store",
    "open_tiers",
]
