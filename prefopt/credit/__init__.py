"""Credit: pure rules from the scores of a group to training labels."""
