"""MTP (multi-token prediction) layers behind the policy, held (`layers`) or trained (`training`)."""
