"""MTP (multi-token prediction) layers behind the policy, held or trained. Start at `layers`."""
