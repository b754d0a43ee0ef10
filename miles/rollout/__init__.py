"""Names around rollouts that functions of users import; the rollouts themselves are in `miles.services.rollout`."""
