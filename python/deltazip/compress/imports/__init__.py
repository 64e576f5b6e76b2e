"""What others have adapted or compressed already, as delta files."""
