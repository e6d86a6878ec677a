"""The weights that are asked: the policy, the embedded and the fake model, guards and judges, and whether those are
proven."""
