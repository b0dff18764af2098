"""What is known of the engines: who they are, what they can, how loaded they are."""
