"""Which tokens top-k distillation sums over: what rollout services and trainers have to agree on. Without torch."""
