"""The steps of one job: load, publish, generate, train, publish, over and over.

No tensors and no disk. Start at `loop`.
"""
