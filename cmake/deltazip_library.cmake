# deltazip_library(NAME SOURCES ... DEPENDS ... PRIVATE_DEPENDS ...): a folder of csrc/, static.
# deltazip_test(NAME SOURCES ... DEPENDS ...): one GoogleTest binary, found by ctest.

set(DELTAZIP_TEST_DATA ${PROJECT_SOURCE_DIR}/tests/data CACHE STRING "Where tests find tests/data")

add_library(deltazip_options INTERFACE)
target_compile_options(deltazip_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-Wnon-virtual-dtor>
  $<$<COMPILE_LANGUAGE:CXX>:-fvisibility=hidden>)
if(DELTAZIP_WERROR)
  target_compile_options(deltazip_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()

set(DELTAZIP_SANITIZE_FLAGS "")
if(DELTAZIP_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES Clang)
    message(FATAL_ERROR "DELTAZIP_FUZZ needs clang (apt install clang), but the C++ compiler is "
                        "${CMAKE_CXX_COMPILER_ID}. Configure with CXX=clang++ (preset fuzz).")
  endif()
  set(DELTAZIP_SANITIZE_FLAGS -fsanitize=fuzzer-no-link,address,undefined)
elseif(DELTAZIP_SANITIZE)
  set(DELTAZIP_SANITIZE_FLAGS -fsanitize=${DELTAZIP_SANITIZE})
endif()
if(DELTAZIP_SANITIZE_FLAGS)
  # -fno-sanitize-recover: undefined behaviour fails the test instead of printing a line.
  list(APPEND DELTAZIP_SANITIZE_FLAGS -fno-sanitize-recover=all)
  target_compile_options(deltazip_options INTERFACE ${DELTAZIP_SANITIZE_FLAGS}
                                                    -fno-omit-frame-pointer)
  target_link_options(deltazip_options INTERFACE ${DELTAZIP_SANITIZE_FLAGS})
endif()

function(deltazip_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS;PRIVATE_DEPENDS" ${ARGN})
  if(ARG_SOURCES)
    add_library(deltazip_${name} STATIC ${ARG_SOURCES})
    target_include_directories(deltazip_${name} PUBLIC ${PROJECT_SOURCE_DIR}/include
                                                PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
    target_link_libraries(deltazip_${name} PUBLIC ${ARG_DEPENDS}
                                           PRIVATE deltazip_options ${ARG_PRIVATE_DEPENDS})
  else()  # headers only
    add_library(deltazip_${name} INTERFACE)
    target_include_directories(deltazip_${name} INTERFACE ${PROJECT_SOURCE_DIR}/include)
    target_link_libraries(deltazip_${name} INTERFACE ${ARG_DEPENDS} ${ARG_PRIVATE_DEPENDS})
  endif()
  add_library(deltazip::${name} ALIAS deltazip_${name})
endfunction()

function(deltazip_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/csrc
                                             ${PROJECT_SOURCE_DIR}/tests/cpp)
  target_compile_definitions(${name} PRIVATE
                             DELTAZIP_TEST_DATA="${DELTAZIP_TEST_DATA}")
  target_link_libraries(${name} PRIVATE deltazip_options ${ARG_DEPENDS} GTest::gtest_main)
  if(DELTAZIP_CUDA)  # where libdeltazip_cuda.so is built; a copy beside the binary comes first
    set_target_properties(${name} PROPERTIES BUILD_RPATH "$ORIGIN/../../..")
    add_dependencies(${name} deltazip_cuda)
  endif()
  add_test(NAME ${name} COMMAND ${name})
endfunction()
