"""The report's sections, a module for each subject: from what was found to parts to be shown."""
