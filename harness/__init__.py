"""What keeps a run safe, shown and described; the method itself stands one floor up, in the project's folder."""
