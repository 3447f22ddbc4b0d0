"""From a reply or a failure to an Outcome: what it says, and about whom."""
