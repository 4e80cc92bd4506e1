# nothing scheduled
