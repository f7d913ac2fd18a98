from lib.startup import start_program

start_program()
