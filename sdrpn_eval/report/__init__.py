"""What results say: tables for a terminal, Markdown, JUnit XML, one HTML page, figures."""
