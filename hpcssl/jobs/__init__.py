"""Launching: resources, submitit, rendezvous."""
