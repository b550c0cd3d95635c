"""Images: layers of files named by their content, kept in any folder, stacked under a sandbox's own writable one."""
