"""What experts do, measured on finished runs: `python -m moe.specialization FOLDER ...`."""
