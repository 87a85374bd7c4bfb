"""The SGLang door: our store as a HiCache storage backend, for exact reuse.

--enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
'{"backend_name": "droidspeak", "module_path": "droidspeak.integrations.sglang_backend.storage",
  "class_name": "DroidSpeakHiCache", "tiers": ["disk:///var/cache/droidspeak"]}'
"""
