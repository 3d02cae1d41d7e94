"""What a run folder is: file names, atomic writes, identity, status, reading a run back."""
