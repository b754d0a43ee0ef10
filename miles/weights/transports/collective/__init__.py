"""Weights broadcast from the trainer's ranks to the engines: NCCL between GPUs, gloo between CPUs.

Start at `transport`.
"""
